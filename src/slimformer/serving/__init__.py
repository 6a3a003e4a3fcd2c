"""A small HTTP service over one delivered model, for `slimformer serve`.

`answering` reads a folder and turns texts into rows and outputs into answers, `batching` brings the rows of many callers together,
`web` has the endpoints and their limits, and `server` runs it all. Only `web` and `server` need the extra `serve`.
"""
