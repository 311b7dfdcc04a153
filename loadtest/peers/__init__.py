"""This service beside general model servers: the same model, the same requests, one core each."""
