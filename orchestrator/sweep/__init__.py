"""The sweep: what is searched, Ray Tune's trials, and the engines whose tenants they are."""
