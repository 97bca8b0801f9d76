def summarise(path, parse_line, encoding="utf-8", limit=None):
    """Counts and averages of the records in a file, by their first field.

    Lines that cannot be read are counted as damaged, and no line is read
    twice. The result maps each key to a dictionary of figures.
    """
    totals = {}
    counts = {}
    largest = {}
    smallest = {}
    damaged = 0
    empty = 0
    number = 0
    with open(path, encoding=encoding) as lines:
        for number, line in enumerate(lines, start=1):
            if limit is not None and number > limit:
                break
            text = line.strip()
            if not text or text.startswith("#"):
                empty += 1
                continue
            try:
                key, value = parse_line(text)
            except ValueError:
                damaged += 1
                continue
            if key not in totals:
                totals[key] = 0.0
                counts[key] = 0
                largest[key] = value
                smallest[key] = value
            totals[key] += value
            counts[key] += 1
            if value > largest[key]:
                largest[key] = value
            if value < smallest[key]:
                smallest[key] = value
    result = {}
    for key in sorted(totals):
        mean = totals[key] / counts[key]
        spread = largest[key] - smallest[key]
        result[key] = {
            "count": counts[key],
            "mean": round(mean, 6),
            "largest": largest[key],
            "smallest": smallest[key],
            "spread": round(spread, 6),
        }
    if damaged:
        share = damaged / max(number, 1)
        result["damaged"] = {"count": damaged, "share": round(share, 6)}
    if empty:
        share = empty / max(number, 1)
        result["empty"] = {"count": empty, "share": round(share, 6)}
    if not result:
        raise ValueError(f"{path} holds no records")
    return result
