"""Ray: the session, the driver of one Ray Train run, and what runs on each worker."""
