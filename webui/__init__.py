"""The web page of app.py: its tabs, and the runs and galleries that it offers.

Gradio is imported when the page is built.
"""
