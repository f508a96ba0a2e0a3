"""One self-contained HTML page about one run or several side by side (`page.write_report`)."""
