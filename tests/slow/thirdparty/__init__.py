"""Other people's models and loops, asked with every verb, and judged by what is not ours.

``python -m tests.slow.thirdparty`` runs the whole table, each model in a process of its own, and
writes ``docs/compatibility.md``; names choose models. What is not installed is left out and named.
"""
