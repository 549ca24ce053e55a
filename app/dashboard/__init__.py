"""The dashboard: pages below `/` for people, made by the server. Programs use the JSON API beside it.

Pages and the API's routes call the same functions (sessions.py, messages.py and rows.py of app/api). So a
user sees and does here exactly what the API allows. queries.py reads what the API does not answer. Everything
works without a script. The script adds live updates: it requests the same page again and takes the parts that
changed.
"""

from outwake.app.dashboard.routes import routes

__all__ = ["routes"]
