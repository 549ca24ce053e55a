"""The dashboard: server-rendered pages below `/`, for people. Programs use the JSON API beside it.

A page shows what the API's own handlers answer, so that it sees and may do what the API lets its user see
and do; queries.py has what no handler answers. Everything works without script, which adds what is live:
it asks for the same page again and takes over the parts that changed.
"""

from outwake.app.dashboard.routes import routes

__all__ = ["routes"]
