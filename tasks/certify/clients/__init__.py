"""Scripts that run inside the environments of servers: the standard library and the server, nothing of Eclectus."""
