"""A fleet of replicas as a simulation: what arrives, who sends it where, what a replica holds, how long things take."""
