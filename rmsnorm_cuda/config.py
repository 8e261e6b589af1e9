"""Settings, for instance `rmsnorm_cuda.config.decompose = True`."""

decompose: bool = False
"""What torch.compile makes of `rms_norm`, `fused_add_rms_norm` and `RMSNorm`. False: one op, our
kernel, with the bits of eager. True: the formula in ATen ops, which Inductor fuses with what stands
around it, rounding as it likes. What writes to its arguments and what quantizes stays an op. Read
while a function is traced; a change of it compiles the function anew."""
