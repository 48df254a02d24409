"""A thin OpenAI-compatible server over one engine. It needs the extra `serve`; `app.create_app` makes it."""
