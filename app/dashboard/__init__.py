"""The dashboard: pages below `/` for people, made by the server. Programs use the JSON API beside it.

A page calls the API's own handlers, so its user sees and does exactly what the API allows. queries.py reads
what no handler answers. Everything works without a script. The script adds live updates: it requests the
same page again and takes the parts that changed.
"""

from outwake.app.dashboard.routes import routes

__all__ = ["routes"]
