"""[verify]: policies, keys, rules by repository; mistakes are refused, since they would let images through."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from lazyfs import config
from lazyfs.config.document import effective, effective_json
from lazyfs.node.verifying import rule_for

if TYPE_CHECKING:
    from pathlib import Path

GOOD = """
[verify]
policy = "warn"
keys = ["/a.pub", "/b.pub"]
[verify.rule."reg.example:5000/team"]
keys = ["/team.pub"]
[verify.rule."reg.example:5000/team/open"]
policy = "off"
[verify.rule."docker.io"]
policy = "off"
"""


def check(tmp_path: Path, text: str, **environ: str) -> tuple[config.Config, list[str]]:
    path = tmp_path / "config.toml"
    path.write_text(text)
    found, problems = config.check(str(path), environ)
    return found, [str(problem) for problem in problems]


def test_keys_and_rules_are_read_and_travel(tmp_path: Path) -> None:
    found, problems = check(tmp_path, GOOD)
    assert problems == []
    assert found.verify.keys == ("/a.pub", "/b.pub")
    assert found.verify.rule["docker.io"].policy == "off"
    assert found.verify.rule["reg.example:5000/team"].policy == "enforce"
    assert config.from_plain(config.to_plain(found)).verify == found.verify
    shown = effective(found)
    assert config.check(str(tmp_path / "config.toml"), {})[0].verify == found.verify
    (tmp_path / "again.toml").write_text(shown)
    assert config.check(str(tmp_path / "again.toml"), {})[0].verify == found.verify
    assert effective_json(found)["rules"]["docker.io"] == {"policy": "off", "keys": []}


@pytest.mark.parametrize(("image", "expected"), [
    ("reg.example:5000/team/app:1", ("enforce", ("/team.pub",))),
    ("reg.example:5000/team:1", ("enforce", ("/team.pub",))),
    ("reg.example:5000/teamwork:1", ("warn", ("/a.pub", "/b.pub"))),
    ("reg.example:5000/team/open/x@sha256:" + "0" * 64, ("off", ())),
    ("reg.example/team/app:1", ("warn", ("/a.pub", "/b.pub"))),
    ("busybox", ("off", ())),
    ("docker.io/library/busybox", ("off", ())),
    ("oci:/srv/docker.io:x", ("warn", ("/a.pub", "/b.pub"))),
])
def test_the_longest_name_counts(tmp_path: Path, image: str, expected: tuple[str, tuple[str, ...]]) -> None:
    rule = rule_for(image, check(tmp_path, GOOD)[0].verify)
    assert (rule.policy, rule.keys) == expected


@pytest.mark.parametrize(("text", "said"), [
    ('[verify]\npolicy = "enforce"', "expects keys beside it"),
    ('[verify]\npolicy = "Enforce"\nkeys = ["/a"]', "expected one of off, warn, enforce"),
    ('[verify]\nkeys = "/a"', "expected a list of absolute paths"),
    ('[verify]\nkeys = ["a"]', "expected a list of absolute paths"),
    ('[verify]\nkeys = ["/a", 3]', "expected a list of absolute paths"),
    ('[verify]\nkey = ["/a"]', "unknown key 'verify.key'"),
    ('[verify.rule."x"]', "expects keys beside it"),
    ('[verify.rule."x/Upper"]\nkeys = ["/a"]', "expected HOST or HOST/REPOSITORY"),
    ('[verify.rule."x y"]\nkeys = ["/a"]', "expected HOST or HOST/REPOSITORY"),
    ("[verify.rule]\nx = 1", "expected a table"),
    ("[verify]\nrule = 1", "tables by repository"),
    ('[verify.rule."x"]\npolicy = "no"\nkeys = ["/a"]', "expected one of off, warn, enforce"),
])
def test_mistakes_are_refused(tmp_path: Path, text: str, said: str) -> None:
    _, problems = check(tmp_path, text)
    assert any(said in problem for problem in problems), problems


def test_the_environment_names_keys_with_colons(tmp_path: Path) -> None:
    found, problems = check(tmp_path, "", LAZYFS_VERIFY_POLICY="enforce", LAZYFS_VERIFY_KEYS="/a.pub:/b.pub")
    assert problems == []
    assert (found.verify.policy, found.verify.keys) == ("enforce", ("/a.pub", "/b.pub"))
    assert "expected a list of absolute paths" in str(check(tmp_path, "", LAZYFS_VERIFY_KEYS="a:b")[1])
