"""Find what mergekit would drop in silence, before hours of merging."""

from mergekit_monosoup.check.document import Finding, check

__all__ = ["Finding", "check"]
