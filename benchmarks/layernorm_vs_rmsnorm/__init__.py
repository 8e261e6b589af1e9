"""LayerNorm or RMSNorm: a study. `python benchmarks/layernorm_vs_rmsnorm --help` runs it."""
