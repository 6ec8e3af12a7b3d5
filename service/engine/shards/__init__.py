"""Tensor parallelism: a base model in parts, one a process, that run every step together.

Process 0 is the server. It leads: what it asks of its runner, it has the others do as well (`leader`, `follower`), so
that all come to the same sums in the layers (`cutting`). The engine knows of none of this.
"""
