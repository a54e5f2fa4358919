"""What every measurement needs: processes with time limits, a private place, a link, a registry, containers."""
