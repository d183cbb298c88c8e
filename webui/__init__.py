"""The web page of app.py: its tabs, and the runs and galleries on offer.

Gradio is imported when the page is built.
"""
