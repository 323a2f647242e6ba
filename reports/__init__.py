"""
Turns finished runs into reports: tables, figures and answers, for report.py, surgery and the studies.

    rows, compare, claims        finished runs as rows; paired differences; claims and their verdicts
    token_table, value_cache     the sections of report.py
    surgery, packed, bytes, gpu  the reports of surgery, of packed folders, of the study of bytes, of the GPU acceptance test
    samples                      text that models write
    markdown, html               markdown tables; HTML pages, with page.css and page.js
"""
