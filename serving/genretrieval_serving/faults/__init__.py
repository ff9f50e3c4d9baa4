"""What a server does when something breaks: processes are killed, databases vanish, disks fill, callers misbehave.

Nothing here is needed to serve. Every fault is a function that breaks something on purpose, under load where load
matters, and counts what got lost; `genretrieval_serving.bench_faults` runs them. The short versions are tests.
"""
