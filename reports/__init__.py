"""
What report.py, surgery and the studies write: runs in, tables, figures and answers out.

    rows, compare, claims        finished runs as rows; paired differences; claims, and whether they hold
    token_table, value_cache     the sections of report.py
    surgery, packed, bytes, gpu  the reports of surgery, of packed folders, of the study of bytes, of the GPU's acceptance
    samples                      what models write
    markdown, html               tables and pages; page.css and page.js are the page's
"""
