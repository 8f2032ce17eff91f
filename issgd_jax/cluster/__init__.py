"""Worker pool on many machines: Ray carries parameters and scores, leases say which worker scores which chunk."""
