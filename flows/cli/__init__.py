"""The command line: `eclectus`, one file per group of commands."""
