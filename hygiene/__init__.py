"""Resource hygiene for long-running processes: registries that stay within their bounds.

Start with `Registry` in code of your own, and with the decorators for code that you would rather not touch.
"""

from hygiene.decorators import bounded_history, bounded_registry, ttl_registry
from hygiene.errors import HygieneError, RegistryFull
from hygiene.events import Cause, Entry, RegistryStats, Removal
from hygiene.guards import guard, load_guards
from hygiene.history import History
from hygiene.registry import Lease, Registry, referenced

__all__ = [
    "Cause",
    "Entry",
    "History",
    "HygieneError",
    "Lease",
    "Registry",
    "RegistryFull",
    "RegistryStats",
    "Removal",
    "bounded_history",
    "bounded_registry",
    "guard",
    "load_guards",
    "referenced",
    "ttl_registry",
]
