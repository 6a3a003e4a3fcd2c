"""What plug-in authors test with: contract checks and tiny random models."""
