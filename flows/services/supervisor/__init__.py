"""One process for each home that `eclectus up` starts: it starts the services, and starts again those that die."""
