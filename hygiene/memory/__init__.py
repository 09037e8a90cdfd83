"""How much memory there is, what to do when it gets short, and what grows."""

from hygiene.memory.budget import MemoryBudget, MemoryShare, ShareUsage
from hygiene.memory.growth import Grower, GrowthWatch, watch_growth
from hygiene.memory.monitor import MemoryHealth, MemoryLevel, MemoryMonitor, MemoryReading, Shed
from hygiene.memory.profile import LineGrowth, MemoryProfile, profile_memory
from hygiene.memory.readings import MemoryLimit, Stall, rss

__all__ = [
    "Grower",
    "GrowthWatch",
    "LineGrowth",
    "MemoryBudget",
    "MemoryHealth",
    "MemoryLevel",
    "MemoryLimit",
    "MemoryMonitor",
    "MemoryProfile",
    "MemoryReading",
    "MemoryShare",
    "ShareUsage",
    "Shed",
    "Stall",
    "profile_memory",
    "rss",
    "watch_growth",
]
