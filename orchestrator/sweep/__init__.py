"""The sweep: what is searched, Ray Tune's trials, and the engine whose tenants they are."""
