"""Many replicas of the server behind one address, each with an engine of its own, on a store that they share.

    client → ingress → router → replica

    ingress    keys, limits and errors, as one server has them; which adapters a request is for
    policy     which replica has those adapters in memory; the next one when it is full; none when all are
    replica    the whole app in a replica's process: asked by a `Forwarded`, it answers in batches of messages

Only `router`, `replicas` and `local` know Ray, which is an extra; `service.ray_app` puts all together.
"""
