"""Real processes under load, broken again and again, and a judge that shares no code with the service."""
