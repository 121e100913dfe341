"""A small picture of lines over time, as SVG, by hand."""

COLOURS = ["#1668b8", "#d1661b", "#2c8f4e", "#8a4fb3", "#b32b3c"]
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 900, 320, 60, 40, 30, 130


def svg(title, unit, lines, phases):
    """`lines`: name → [(seconds, value)]; `phases`: [(begins at, name)]."""
    points = [point for line in lines.values() for point in line]
    far, high = max(at for at, _ in points) or 1, max(value for _, value in points) * 1.1 or 1
    x = lambda at: round(LEFT + at / far * (WIDTH - LEFT - RIGHT), 1)
    y = lambda value: round(HEIGHT - BOTTOM - value / high * (HEIGHT - BOTTOM - TOP), 1)
    text = lambda at, up, words, more="": f'<text x="{at}" y="{up}" font-size="11" {more}>{words}</text>'
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
           f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>', text(LEFT, 14, title, 'font-weight="bold"')]
    for tick in range(5):
        value = high * tick / 4
        out.append(f'<path d="M{LEFT} {y(value)}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        out.append(text(LEFT - 6, y(value) + 4, f"{value:.0f}", 'text-anchor="end"'))
        out.append(text(x(far * tick / 4), HEIGHT - 22, f"{far * tick / 4:.0f} s", 'text-anchor="middle"'))
    out.append(text(6, TOP - 4, unit))
    for number, (at, name) in enumerate(phases):
        out.append(f'<path d="M{x(at)} {TOP}V{HEIGHT - BOTTOM}" stroke="#999" stroke-dasharray="3"/>')
        out.append(text(x(at) + 2, TOP + 10 + 11 * (number % 3), name, 'fill="#666"'))
    for number, (name, line) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        path = "L".join(f"{x(at)} {y(value)}" for at, value in line)
        out.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        out.append(text(WIDTH - RIGHT + 8, TOP + 14 + 16 * number, name, f'fill="{colour}"'))
    return "\n".join([*out, "</svg>\n"])
