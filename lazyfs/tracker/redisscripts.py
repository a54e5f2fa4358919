"""
What happens in Redis as a whole or not at all, as scripts; and the names of the keys they work on.

Layer: tracker. Who calls: tracker.redisstore. Of a cluster there are, under `lazyfs:{cluster}:` (the braces keep them
on one server of a Redis cluster): `alive`, sorted set of members by when they were last heard of; `state`, hash of what
each said; `log`, stream of changes, each with the number that `seq` had (it begins with the time: what was lost with a
Redis that kept nothing is seen as a gap); `isolated`, sorted set by until when;
`of:NAME` and `by:NAME`, reports about and by a member. Times are Redis' own, in seconds. The rules are those of
tracker.store, which says why.
"""

from __future__ import annotations

from typing import Final

LOG_COUNT_MAX: Final = 20_000    # changes that a tracker may have missed; more, and it reads all of the cluster anew

_TIME = "local t = redis.call('TIME'); local now = tonumber(t[1]) + tonumber(t[2]) / 1e6\n"
_SAY = f"""
local function say(kind, id, value)
  if redis.call('EXISTS', KEYS[4]) == 0 then redis.call('SET', KEYS[4], math.floor(now * 1000)) end
  local seq = string.format('%.0f', redis.call('INCR', KEYS[4]))
  redis.call('XADD', KEYS[3], 'MAXLEN', '~', {LOG_COUNT_MAX}, seq .. '-1', 'k', kind, 'i', id, 'v', value)
end
"""

# KEYS alive state log seq; ARGV id, state, members_max -> 1, or 0: there are too many
UPDATE: Final = _TIME + _SAY + """
if redis.call('HEXISTS', KEYS[2], ARGV[1]) == 0 and redis.call('HLEN', KEYS[2]) >= tonumber(ARGV[3]) then return 0 end
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
redis.call('ZADD', KEYS[1], string.format('%.3f', now), ARGV[1])
say('set', ARGV[1], ARGV[2])
return 1
"""

# KEYS alive state log seq; ARGV id
LEAVE: Final = _TIME + _SAY + """
redis.call('ZREM', KEYS[1], ARGV[1])
if redis.call('HDEL', KEYS[2], ARGV[1]) == 1 then say('gone', ARGV[1], '') end
return 1
"""

# KEYS alive state log seq; ARGV ttl, count_max. Who is silent for longer is gone, for all trackers at once.
REAP: Final = _TIME + _SAY + """
local late = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now - tonumber(ARGV[1]), 'LIMIT', 0, tonumber(ARGV[2]))
for _, id in ipairs(late) do
  redis.call('ZREM', KEYS[1], id)
  if redis.call('HDEL', KEYS[2], id) == 1 then say('gone', id, '') end
end
return #late
"""

# KEYS alive state log seq isolated by of; ARGV by, of, window, seconds, accused_max, small, share
REPORT: Final = _TIME + _SAY + """
redis.call('ZREMRANGEBYSCORE', KEYS[5], '-inf', now)
if ARGV[1] == ARGV[2] or redis.call('ZSCORE', KEYS[5], ARGV[1]) or redis.call('HEXISTS', KEYS[2], ARGV[1]) == 0
  or redis.call('HEXISTS', KEYS[2], ARGV[2]) == 0 then return 0 end
local before = now - tonumber(ARGV[3])
for i, other in ipairs({ARGV[2], ARGV[1]}) do
  redis.call('ZREMRANGEBYSCORE', KEYS[5 + i], '-inf', before)
end
redis.call('ZADD', KEYS[6], now, ARGV[2])
redis.call('EXPIRE', KEYS[6], math.ceil(tonumber(ARGV[3])))
if redis.call('ZCARD', KEYS[6]) > tonumber(ARGV[5]) then return 0 end
redis.call('ZADD', KEYS[7], now, ARGV[1])
redis.call('EXPIRE', KEYS[7], math.ceil(tonumber(ARGV[3])))
local members = redis.call('HLEN', KEYS[2])
local quorum = members < tonumber(ARGV[6]) and 2 or 3
if redis.call('ZSCORE', KEYS[5], ARGV[2]) or redis.call('ZCARD', KEYS[7]) < quorum
  or redis.call('ZCARD', KEYS[5]) >= math.max(1, math.floor(members * tonumber(ARGV[7]))) then return 0 end
local til = string.format('%.3f', now + tonumber(ARGV[4]))
redis.call('ZADD', KEYS[5], til, ARGV[2])
say('isolated', ARGV[2], til)
return 1
"""

# KEYS alive state isolated seq -> all of a cluster, of one moment
LOAD: Final = _TIME + """
redis.call('SET', KEYS[4], math.floor(now * 1000), 'NX')
return {redis.call('GET', KEYS[4]), redis.call('HGETALL', KEYS[2]),
        redis.call('ZRANGE', KEYS[1], 0, -1, 'WITHSCORES'), redis.call('ZRANGE', KEYS[3], 0, -1, 'WITHSCORES')}
"""

# Small things of other parts, a hash of values and a sorted set of their ends. KEYS values ends
_SWEEP = """
for _, name in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now, 'LIMIT', 0, 1000)) do
  redis.call('ZREM', KEYS[2], name); redis.call('HDEL', KEYS[1], name)
end
"""
# ARGV name, value, seconds, count_max -> 1, or 0: there are too many
PUT: Final = _TIME + _SWEEP + """
if redis.call('HLEN', KEYS[1]) >= tonumber(ARGV[4]) and redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('ZADD', KEYS[2], string.format('%.3f', now + tonumber(ARGV[3])), ARGV[1])
local last = tonumber(redis.call('ZRANGE', KEYS[2], -1, -1, 'WITHSCORES')[2])
for i = 1, 2 do redis.call('EXPIRE', KEYS[i], math.ceil(math.max(1, last - now))) end
return 1
"""
# ARGV name -> value or nothing
GET: Final = _TIME + """
local til = redis.call('ZSCORE', KEYS[2], ARGV[1])
if not til or tonumber(til) <= now then return false end
return redis.call('HGET', KEYS[1], ARGV[1])
"""
# -> name, value, name, value ...
ALL: Final = _TIME + _SWEEP + "return redis.call('HGETALL', KEYS[1])"
# ARGV name
DROP: Final = "redis.call('ZREM', KEYS[2], ARGV[1]); return redis.call('HDEL', KEYS[1], ARGV[1])"


def keys_of(cluster: str) -> dict[str, str]:
    """The keys of a cluster."""
    return {name: f"lazyfs:{{{cluster}}}:{name}" for name in ("alive", "state", "log", "seq", "isolated", "by", "of")}


def item_keys(collection: str) -> list[str]:
    """The keys of a collection."""
    return [f"lazyfs:{{items:{collection}}}:{name}" for name in ("values", "ends")]
