"""Registration of service instances and their discovery."""
