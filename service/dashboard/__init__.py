"""The built-in page of the service, which shows what /metrics says."""
