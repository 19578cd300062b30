"""An HTTP server of ordered text and images: OpenAI's protocols in front of an engine.

budget       what all requests together hold in memory
app          create_app: the routes, over any engine
engine       the interface of an engine, and its events
inspection   where MMFS looked while a stored response was generated
model        the engine of a model, with continuous batching in a thread of its own
page         the web page at `/`, whose files are in web/
stub         a deterministic engine without a model, for tests of everything else
"""
