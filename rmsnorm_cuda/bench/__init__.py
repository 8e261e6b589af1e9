"""`python -m rmsnorm_cuda bench`: values, then times, on the machine that is here.

contenders.py has what is timed beside ours, timing.py the loops, buffers.py the memory, machine.py
what figures depend on; benchmarks/ of the repository takes these too. cells.py and command.py are
the command. Nothing here is imported by `import rmsnorm_cuda`.
"""
