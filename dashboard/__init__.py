"""The dashboard: Streamlit pages over the artefact store. It reads and draws, and computes nothing.

`SPARSEMILL_STORE=./store streamlit run dashboard/app.py`
"""
