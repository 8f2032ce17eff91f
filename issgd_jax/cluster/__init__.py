"""The worker pool over many machines: Ray carries parameters out and scores back, `leases` says who scores what."""
