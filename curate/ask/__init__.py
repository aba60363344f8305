"""What a user asks of a dataset folder that is there: explain, inspect, diff, sql, verify. Reads only; changes nothing.

Every answer comes from the folder's own files, so it can be had before the report is made, of a copy without its raw
shards, and of a folder that cannot be written to. What is returned is plain data; `curate.ask.text` prints it.
"""
