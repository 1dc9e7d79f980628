"""One study told on paper: the same value as a self-contained HTML file and as a PDF.

    blocks    what a report is made of: facts, tables, pictures, charts
    content   the report of a study, made from the ledger, the job's report and the looks
    figures   the part about one derived series: kernel, regions, gates, checks, uncertainty
    charts    a chart as SVG and as a PDF drawing, from one layout
    html, pdf the writers; they decide nothing
    files     whole on disk or not at all, and never over something else
"""
