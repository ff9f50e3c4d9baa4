"""The server and its client: a bundle to gRPC and REST."""
