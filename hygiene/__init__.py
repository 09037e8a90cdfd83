"""Resource hygiene for long-running processes: what is held stays within bounds, and what is opened is closed.

Start with `Registry`, `managed_session` and `Pool` in code of your own, and with the decorators for code that you would
rather not touch.
"""

import hygiene.compact  # noqa: F401 - it tells `History` what compact=True means
from hygiene.cleanup import (
    Cleanup,
    ShutdownReport,
    SignalHandlers,
    ashutdown,
    install_signal_handlers,
    register_cleanup,
    shutdown,
)
from hygiene.decorators import bounded_history, bounded_registry, registry_of, ttl_registry
from hygiene.errors import (
    HygieneError,
    LeaseTimeout,
    NotStorable,
    OwnershipLost,
    PoolClosed,
    PoolFull,
    PoolTimeout,
    RegistryFull,
    StoreError,
    StoreUnavailable,
    VersionConflict,
)
from hygiene.events import Cause, Entry, PoolStats, RegistryStats, Removal
from hygiene.exposing import Exposure, expose
from hygiene.guards import guard, load_guards
from hygiene.history import History
from hygiene.kernel import compiled
from hygiene.listeners import weak_listeners
from hygiene.memory import (
    Grower,
    GrowthWatch,
    LineGrowth,
    MemoryBudget,
    MemoryHealth,
    MemoryLevel,
    MemoryMonitor,
    MemoryProfile,
    MemoryReading,
    MemoryShare,
    profile_memory,
    watch_growth,
)
from hygiene.owning import owns
from hygiene.pool import AsyncPool, AsyncPoolLease, Holder, Pool, PoolLease, managed_pool
from hygiene.registry import Lease, Registry, referenced
from hygiene.reporting import Report, report
from hygiene.session import AsyncSession, Session, current_session, managed_session
from hygiene.shared import ManagedLocal, SharedResource, managed_local, shared_resource
from hygiene.stores import SQLiteStore, Store, open_store
from hygiene.writebehind import WriteBehind

__version__ = "0.1.0"

__all__ = [
    "AsyncPool",
    "AsyncPoolLease",
    "AsyncSession",
    "Cause",
    "Cleanup",
    "Entry",
    "Exposure",
    "Grower",
    "GrowthWatch",
    "History",
    "Holder",
    "HygieneError",
    "Lease",
    "LeaseTimeout",
    "LineGrowth",
    "ManagedLocal",
    "MemoryBudget",
    "MemoryHealth",
    "MemoryLevel",
    "MemoryMonitor",
    "MemoryProfile",
    "MemoryReading",
    "MemoryShare",
    "NotStorable",
    "OwnershipLost",
    "Pool",
    "PoolClosed",
    "PoolFull",
    "PoolLease",
    "PoolStats",
    "PoolTimeout",
    "Registry",
    "RegistryFull",
    "RegistryStats",
    "Removal",
    "Report",
    "SQLiteStore",
    "Session",
    "SharedResource",
    "ShutdownReport",
    "SignalHandlers",
    "Store",
    "StoreError",
    "StoreUnavailable",
    "VersionConflict",
    "WriteBehind",
    "ashutdown",
    "bounded_history",
    "bounded_registry",
    "compiled",
    "current_session",
    "expose",
    "guard",
    "install_signal_handlers",
    "load_guards",
    "managed_local",
    "managed_pool",
    "managed_session",
    "open_store",
    "owns",
    "profile_memory",
    "referenced",
    "register_cleanup",
    "registry_of",
    "report",
    "shared_resource",
    "shutdown",
    "ttl_registry",
    "watch_growth",
    "weak_listeners",
]
