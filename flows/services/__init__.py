"""The services that runs need: Prefect server, worker, Ray, deployments, automations."""
