"""Messages published at set times: what a schedule says, when that is, and who does it once."""
