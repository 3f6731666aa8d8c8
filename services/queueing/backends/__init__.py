"""Engines behind Broker."""
