"""The contract between trainer and service: schema, encoder, user record, bundle, errors."""
