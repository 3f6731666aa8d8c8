"""What a broker cannot hold, in a database: a SQLite file, or a PostgreSQL that several replicas share."""

from services.queueing.state.database import Database
from services.queueing.state.schema import Schema

__all__ = ["Database", "Schema"]
