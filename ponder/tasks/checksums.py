"""SHA-256 of each data file that has really been read, unzipped, so that plain and gzipped copies both pass.

Of the bAbI test files those are the halves with the even stories ("_even"). A file that is not listed is read
unchecked.
"""

from __future__ import annotations

_TEXT = {
    "tinyshakespeare": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    "wikitext2_valid": "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
}

_BABI_1K = {
    "qa1_single-supporting-fact_train": "c64ba9b1a49bbb111ffc4cd2ae4f129d25c012399dd7ade9679eea464b9afb05",
    "qa2_two-supporting-facts_train": "a4978af5bc0dc30191810e7c9949aaa6eae939ed0f6beb9fcb5f4330c2a27860",
    "qa3_three-supporting-facts_train": "a6e78019f36a02a7ed71fe6aaded0b563ff09c8deec392931801fcd9c6af4d60",
    "qa4_two-arg-relations_train": "c9370502d85fa382f32d1fea2111e817f81ae9e3e79eb2924a1a5392a90417fa",
    "qa5_three-arg-relations_train": "086cd59c3ca9677bfac3d6a22ca5853c76a5c1fbae3159c7c4a6aef759a74ec0",
    "qa6_yes-no-questions_train": "5a133115ee35d475776df703ff605d145b11effbcdbf7e74861f9d5639246a5a",
    "qa7_counting_train": "dca03bd91876951c49f1c971c83c9dd55404de60201b7b6435451cf7ddb4751c",
    "qa8_lists-sets_train": "058604df6f9440458317e8ae685d2b7b84261e1a80b4d6410a9140d16f81bf06",
    "qa9_simple-negation_train": "0c3b89921af0caea1c4059ee3f7b7f2a88869f924195a428da37820446b8c49f",
    "qa10_indefinite-knowledge_train": "0b7691689447bab05476c5b48c44999b41e747c3978df69c18fdd87b60d6e8b3",
    "qa11_basic-coreference_train": "9468de9a1f256f43dfda693a5d07182d21149a82b65f7c2451c64e9cff5eb138",
    "qa12_conjunction_train": "45c2764bb2d3c8f699d35e9d9aa7958fcd96379c6e907116cdf74526c108bb25",
    "qa13_compound-coreference_train": "533a391edbda743e4c99504de88b40cdded5b1d5ef454d1390f0863f748a4cc9",
    "qa14_time-reasoning_train": "b7561cbc624205c9c2fdbb8c843cfa8ad90edd65e78bb223fc6dea8113662df8",
    "qa15_basic-deduction_train": "e856ebfdcce4dd7d617c1d10f985e96a0850c0ca18e9a19a017cb710d135ed3d",
    "qa16_basic-induction_train": "20121005137e3d4b061a086eb177a456303d5742b764eb8da2d0e480b6af4d28",
    "qa17_positional-reasoning_train": "20083bf56ff74f0e7cf5e3e2f8c3905cdb8ef09293c3e8cf7a96ed8b45ae2277",
    "qa18_size-reasoning_train": "18b7dcf52c9a0e87e4e7dd3d65b7e5a630de039645f52a1294197af7481d739d",
    "qa19_path-finding_train": "dcb788352a56effb7bea1449128f31cc9c342c8c327b6df2caeee0e379e6ad3a",
    "qa20_agents-motivations_train": "29580ad55fb7b4b29ba014696056cc68f8f347dac3be88470fd692ad60150398",
    "qa1_single-supporting-fact_test_even": "1839700f2a10a8717fac1d89979c5c993e9fb8b53a23d484b9a6659ae11bb716",
    "qa2_two-supporting-facts_test_even": "691cfb355500ba8623b5ceb9b629e552d62534bbd87d3767e030e45bc452226a",
    "qa3_three-supporting-facts_test_even": "dffb5abe362134f9ddaa26a9ee023b0d61c4215a0e56b814a088533e71857197",
    "qa4_two-arg-relations_test_even": "ace6d5c0ce4c984567222ca9a22dded845d3a8bd56d5c0ac5285e0889e9b82a5",
    "qa5_three-arg-relations_test_even": "5f6ba0306ddb2c0eea044bf5526c951363df110b83a71883e33a221ad899fdf8",
    "qa6_yes-no-questions_test_even": "bc0ec2a36d6207eaf327c2b461f9a858d372d0d809f13ed378cad93222d3e2d3",
    "qa7_counting_test_even": "c5380a24a5d144af6b56aba9dc1fc13eb00533fb5af1857da406d5af898dc394",
    "qa8_lists-sets_test_even": "2c5e62455f670e7a00cbe92b3be51dc3c54aea434c6d69059e03c836556d7dc3",
    "qa9_simple-negation_test_even": "16f9292a639be6c04b2ab8a96a7518d13a7b4e41e15ca2d861ddc42c3a808d73",
    "qa10_indefinite-knowledge_test_even": "77ac7656db586a02306d6cbb30ecf12f31d92efee611928ffa788d7f76048676",
    "qa11_basic-coreference_test_even": "9b5c952d30c714d451c3fba18025171dbbc43fc3cd24dd0f95656aa78559ac4d",
    "qa12_conjunction_test_even": "98a364641c772572c1a3f6ee1b976078876f69c7905e0bb69a8e00daaead9ad8",
    "qa13_compound-coreference_test_even": "beb3efec56915c30521c0509f0d4f9ad7ec406320ff041f31456c456da4de85a",
    "qa14_time-reasoning_test_even": "bd891992663cf2c8338b97635c7608a0c30a3182b0c4b1fd7600d1355605b7c0",
    "qa15_basic-deduction_test_even": "dbdcec289d1c75ba3778fe99b164672f800a89ef75617bc1f56cc8a2cbe5ee7d",
    "qa16_basic-induction_test_even": "542483369b65412f7171c891029cc8cd698fb3e337f76b96528b24659774b735",
    "qa17_positional-reasoning_test_even": "0dc3fccef21265305f152f7cacfa41deefd4b8574508374029ccf88317f05c6a",
    "qa18_size-reasoning_test_even": "bf8be7477eb524b0153ae3f12223e18d0f48bf4fe36ef83fc81472031be95912",
    "qa19_path-finding_test_even": "42202b66119f29eda38988e22c746cb6796232c731a14204a257223078b310e2",
    "qa20_agents-motivations_test_even": "8725fda42daa24f0a7896de9846cd7a1102a88a77313f62ac46d5068c4192010",
}

_BABI_10K = {
    "qa1_single-supporting-fact_train": "749ea9f7c99070feb2d88c975a254417a0dcc8274add4435ae5ae24c7afc7e9d",
    "qa2_two-supporting-facts_train": "d4074c0c5d54f70ce2f538056ce2b6ef6a313da336da4245f1a24f1298e37ef3",
    "qa4_two-arg-relations_train": "5d11b821d35234988ab907866aa7ce718e6b6d751acf63bdef52262afb59f12c",
    "qa5_three-arg-relations_train": "2506910935b701bac64fc8b1d7ff12bd8d0f47ceefca183454282bec784c12a5",
    "qa6_yes-no-questions_train": "602f379184bf3cb59660d0f7769d9c94ccdc1fc4d82dfe90bd460d985b1ff0c5",
    "qa7_counting_train": "4a2508733bef9b38cfce4b3108a91b83cdee378de4a7370e4d32fea2dacd3b7d",
    "qa8_lists-sets_train": "9518da2d3aa5d98bec33335e0d5ba3a22c2bd1929ee679085d37eb50a7652e4a",
    "qa9_simple-negation_train": "5f8949f6ef7d64516fc4dd5732b12b5932d057b1a614e8ac94e795fb020d4ff0",
    "qa10_indefinite-knowledge_train": "c5c0788b0446095c07a0442784cad2b59c1d58e875ebe8ad852f5e3f628613f4",
    "qa11_basic-coreference_train": "edfcd97fecd4a5045af25e1790cf1408856ae362c39521b1b69cd32b88ec0ced",
    "qa12_conjunction_train": "39d58df3564916c66cebc98befb65d605c032181e51208730fd8837a77bc166a",
    "qa13_compound-coreference_train": "c530fdf122d26617a8a03ba5cdbacee87c22624ba7f50d1f07f9658c900e22d8",
    "qa14_time-reasoning_train": "c322e0814eef71f088af1aa1334e7ae4b1ee6ca18f2ee94c05e2189226964ed6",
    "qa15_basic-deduction_train": "0a86673f7fafa484f8ee394048f03de19405bdc40b58f21086969efad2862010",
    "qa16_basic-induction_train": "27fef347ce0b25dd148efea2b15f154926e0e9069d4ea6ab9cfca3add492ab35",
    "qa17_positional-reasoning_train": "8a383651e009db50d6c9effed5778b8646c28c55fadb1592b5f4d8d3a187bbce",
    "qa18_size-reasoning_train": "9e7c15107067d2070170ef12579a8bfe34dfc35a7ac9ebd13f2001dc1a7488f9",
    "qa19_path-finding_train": "6cfdc6f448e3cf0e3d8a390fa3add461935b033f89ede32aeef30812401ec91e",
    "qa20_agents-motivations_train": "36f20f3baf6bad2297d5b9fd877e633550c36106fe78bc10ddfb7b1eede62573",
}

_SUDOKU = {
    "clue17_train": "8fb2ff30a3c84f81706d2df5dc322ae82de4d84673592d734a9c98fa9661d44c",
    "clue17_test": "378f4741024c9808308ef215655696961138a5b60d11ff1bca56cbd716b4833b",
    "top1465_train": "6c2e8e2d52d0be75293ae2dafdccc26e601285c929b4ecc803bc092963a453c3",
}

_CLRS = {
    "minimum": "d3a8ac02395a543ff45077eef9b2d329986c3222d8c2ccc6e9c496494efb7245",
    "binary_search": "c21514f597f3087abb4645c22ebd77ab1bcabd3a57729750c9075da2b22e5916",
    "quickselect": "4511f116d45d59b98c9dfea5488a6183f491cabf50a14e7ded68cd234a19748a",
    "insertion_sort": "1391a04a0f767f4668c4a19b6093c51fac5d55fbc185385545fc21fc5d6ab601",
    "bubble_sort": "1391a04a0f767f4668c4a19b6093c51fac5d55fbc185385545fc21fc5d6ab601",
    "heapsort": "1391a04a0f767f4668c4a19b6093c51fac5d55fbc185385545fc21fc5d6ab601",
    "quicksort": "1391a04a0f767f4668c4a19b6093c51fac5d55fbc185385545fc21fc5d6ab601",
    "bfs": "88406f223b58efcefc7a8e7a0a8a219b0351dd3188b197a6aef34571fb893b4a",
    "dfs": "6b7b27c7c296a727a0d0711eefe975f828c5a681192f3c67ad63d46bb598b803",
    "bellman_ford": "16daade4158fb69980623ac3b011a41ed8dade06f0576b1c3a5298f076ac367f",
    "dijkstra": "16daade4158fb69980623ac3b011a41ed8dade06f0576b1c3a5298f076ac367f",
    "dag_shortest_paths": "d4f220add9472ca107f4bea1bc42fb1b39e1dea8ffe3c1e0f54df8d55e816675",
    "mst_prim": "4f951350d75fa549d735ac9bd0cc1d643ed0e8f3612723f5e27f486295c162d0",
}

_FOLDERS = {
    "text/{}.txt": _TEXT,
    "babi/en/{}.txt": _BABI_1K,
    "babi/en-10k/{}.txt": _BABI_10K,
    "sudoku/{}.csv": _SUDOKU,
    "clrs/{}.npz": _CLRS,
}

SHA256: dict[str, str] = {
    path.format(name): digest for path, table in _FOLDERS.items() for name, digest in table.items()
}
