"""How results are shown; nothing is measured here.

``report`` holds the object, ``schema`` its JSON form; ``terminal``, ``github`` and ``html`` (with
``vector`` and ``figures``) are its renderers, which share ``wording`` and ``excerpts``; ``text``
has the tables of other commands.
"""
