"""What the tour says, by language and step: a title, in which `{path}` is the norm that is looked at, and a text."""

ENGLISH = {
    "input": (
        "1. What comes in: {path}",
        "One row for each token, as wide as the model. These are the last token's first numbers in a real "
        "checkpoint. A norm looks at one row at a time: no other token and no other text of a batch changes "
        "what it does to it.",
    ),
    "mean": (
        "2. The mean of the squares, over which dimension?",
        "x has the shape (tokens, width), and a norm wants one number for each token: the mean over the last "
        "dimension, -1, which is dimension 1 here. Without keepdim the result has lost that dimension, and "
        "dividing fails, or, where sizes happen to be equal, divides by another token's number. Without any "
        "dimension all tokens share one number.",
    ),
    "root": (
        "3. rsqrt, or one over the root?",
        "The same number, rsqrt(s) = 1/√s, in one operation instead of two. Both are right to the last bit or so.",
    ),
    "wide": (
        "4. Why the detour through float32",
        "A square needs twice the range and the mean twice the digits of its input. bfloat16 has eight "
        "significant bits, float16 ends at 65,504, which is reached by squaring 256. So squares, mean and "
        "root are taken in float32.",
    ),
    "eps": (
        "5. Why eps, and why inside the root",
        "A row of zeros would be 0/0. eps under the root is added to the mean square: rows whose mean square "
        "is near eps come out smaller than one, and a row of zeros stays zero. Outside the root it would be "
        "weighed against the RMS instead of its square, and small rows would come out hundreds of times "
        "larger: the commonest mistake in ports.",
    ),
    "gain": (
        "6. What the gain does",
        "After the division every row has length √width: the RMS is one whatever came in. The gain g, one "
        "learned number for each element, then says how much of each the next matrix gets to see. It does not"
        " depend on the input.",
    ),
    "cast": (
        "7. Why the cast comes first",
        "LLaMA rounds to the model's dtype and then multiplies by the gain; Gemma and OLMo 2 multiply first "
        "and round last. With a gain of one nobody sees a difference, so a test whose gains are one proves "
        "nothing.",
    ),
    "claim": (
        '8. "It is there against internal covariate shift"',
        "Often taught, and not what is measured: batch normalisation helps as much when the shift is put back"
        " (Santurkar et al. 2018). What can be measured here is that the stream grows from layer to layer "
        "while each branch is fed rows of one size; that removing the mean as well, as LayerNorm does, would "
        "change next to nothing; and that no gradient flows along x: a norm takes away the length of a row, "
        "and with it the risk of that length growing.",
    ),
}
KOREAN = {
    "input": (
        "1. 들어오는 값: {path}",
        "토큰마다 한 행이 있고, 행의 너비는 모델의 너비와 같습니다. 아래는 실제 체크포인트에서 마지막 "
        "토큰의 처음 몇 개 값입니다. 정규화는 한 번에 한 행만 봅니다. 다른 토큰이나 배치 안의 다른 "
        "문장은 결과를 바꾸지 않습니다.",
    ),
    "mean": (
        "2. 제곱의 평균, 어느 차원으로?",
        "x의 모양은 (토큰, 너비)이고, 정규화에는 토큰마다 수 하나가 필요합니다. 그래서 마지막 차원 "
        "-1(여기서는 1)로 평균을 냅니다. keepdim이 없으면 그 차원이 사라져 나눗셈이 "
        "실패하거나, 크기가 우연히 같으면 다른 토큰의 값으로 나누게 됩니다. 차원을 주지 않으면 모든 "
        "토큰이 수 하나를 함께 씁니다.",
    ),
    "root": (
        "3. rsqrt와 1/제곱근",
        "같은 수입니다. rsqrt(s) = 1/√s. 연산이 두 번이 아니라 한 번입니다. 둘 다 마지막 비트 정도까지 정확합니다.",
    ),
    "wide": (
        "4. 왜 float32로 돌아가는가",
        "제곱에는 두 배의 범위가, 평균에는 두 배의 자릿수가 필요합니다. bfloat16의 유효 비트는 "
        "여덟 개이고, float16은 65,504까지라서 256을 제곱하면 넘칩니다. 그래서 제곱, "
        "평균, 제곱근은 float32로 계산합니다.",
    ),
    "eps": (
        "5. eps는 왜 필요하고, 왜 제곱근 안에 있는가",
        "0으로만 된 행은 0/0이 됩니다. 제곱근 안의 eps는 제곱 평균에 더해집니다. 제곱 평균이 "
        "eps에 가까운 행은 1보다 작게 나오고, 0인 행은 0으로 남습니다. 제곱근 밖에 두면 제곱이 "
        "아니라 RMS와 견주게 되어 작은 행이 수백 배 크게 나옵니다. 이 정규화를 옮겨 쓸 때 가장 "
        "흔한 실수입니다.",
    ),
    "gain": (
        "6. 이득(gain)이 하는 일",
        "나눗셈이 끝나면 무엇이 들어왔든 행의 RMS는 1이고 길이는 √너비입니다. 원소마다 하나씩 학습된"
        " 수 g는 다음 행렬이 각 원소를 얼마나 볼지 정합니다. g는 입력에 따라 달라지지 않습니다.",
    ),
    "cast": (
        "7. 왜 형 변환이 먼저인가",
        "LLaMA는 모델의 dtype으로 반올림한 다음 이득을 곱하고, Gemma와 OLMo 2는 먼저 "
        "곱한 다음 마지막에 반올림합니다. 이득이 1이면 차이가 보이지 않습니다. 그래서 이득이 1인 "
        "시험은 아무것도 증명하지 못합니다.",
    ),
    "claim": (
        '8. "내부 공변량 변화를 막기 위한 것이다"',
        "흔히 그렇게 가르치지만 측정 결과는 다릅니다. 배치 정규화는 그 변화를 일부러 되돌려 넣어도 "
        "똑같이 도움이 됩니다 (Santurkar 외 2018). 여기서 잴 수 있는 것은 이렇습니다. "
        "잔차 흐름은 층을 지날수록 커지지만 각 가지에는 크기가 같은 행이 들어갑니다. "
        "LayerNorm처럼 평균까지 빼도 거의 달라지지 않습니다. 그리고 x 방향으로는 기울기가 흐르지"
        " 않습니다. 정규화는 행의 길이를 없애고, 그 길이가 커질 위험도 함께 없앱니다.",
    ),
}
TEXTS = {"en": ENGLISH, "ko": KOREAN}
