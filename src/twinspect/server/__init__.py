"""The server room: HTTP API, micro-batching, inspection log and page, over any bundle or exported model.

Needs the extra ``server`` (FastAPI, uvicorn, prometheus-client, python-multipart, SQLAlchemy).
"""
