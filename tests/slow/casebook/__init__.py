"""The casebook: public reports of a train/inference gap, each a small scenario that runs.

``python -m tests.slow.casebook`` prints what ``frostline.diagnose`` says to each;
``test_casebook.py`` holds it to what the report's own thread found out. A
scenario uses Frostline as a user does.
"""
