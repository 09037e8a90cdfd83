"""What the library costs, beside what others cost: ``python -m benchmarks registries``, ``pools`` or ``sessions``."""
